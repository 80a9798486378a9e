"""What is remembered of a video, and what a layer sees when it looks back."""
