"""What rules and policies are written in: checked values, bands, conditions, lists and files."""
