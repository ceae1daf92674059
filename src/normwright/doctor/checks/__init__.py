"""The checks, one file each; the file's class is the check and its docstring the check's page."""
