"""The body of AMI: senses, acts on a fixed time grid, streams its experience, follows the trainers' parameters."""
