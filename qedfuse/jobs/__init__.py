"""One job each on an open image, and what all jobs have in common. They know an image, not a mount."""
