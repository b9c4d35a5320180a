"""Small programs that embed the manager: to read, to copy, to run."""
