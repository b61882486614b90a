"""What LocalStorage is made of: plain system calls on folders and files of a POSIX file system."""
