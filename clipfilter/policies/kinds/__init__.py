"""The kinds of rules, one file for each, and the registry that lists them; nothing outside names a kind."""
