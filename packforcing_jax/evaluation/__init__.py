"""What a model knows, read off its videos."""
