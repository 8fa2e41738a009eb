"""The policy language: YAML with places, what a policy may say, and how it is put together from files."""
