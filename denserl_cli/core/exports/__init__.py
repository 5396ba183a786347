"""What an exported folder needs so that other programs read it as the model that was trained."""
