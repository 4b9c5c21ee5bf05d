"""What is on disk: values against brute force, bytes against other readers, malformed input against the error tree."""
