"""What is run in the environments of other engines; nothing here is imported by the package."""
