"""What FsspecStorage is made of: uploads that never publish half an object, errors in our words, and kept secrets."""
