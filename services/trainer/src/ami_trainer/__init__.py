"""The trainers of AMI: receive experience, learn, publish parameters."""
