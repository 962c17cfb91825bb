"""What a report says: the 14 observations, CheXbert, and training a labeler."""
