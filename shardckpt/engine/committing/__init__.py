"""Commit: receipts become a record, and the record is put in force."""
