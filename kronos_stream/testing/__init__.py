"""What tests need, shipped so that users' tests can have it too."""
