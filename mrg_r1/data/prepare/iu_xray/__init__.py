"""IU X-Ray in its three layouts: Open-i's XMLs, Kaggle's CSVs, R2Gen's annotation.json."""
