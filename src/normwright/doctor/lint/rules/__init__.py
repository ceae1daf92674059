"""The rules, one file each; the file's class is the rule and its docstring the rule's page."""
