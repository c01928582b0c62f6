"""The trainers of AMI: take in experience, learn, publish parameters."""
