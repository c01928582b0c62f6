"""Where trainers keep experience: preallocated arrays of the records' own dtypes."""
