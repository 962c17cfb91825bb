"""A recipe: YAML and `key=value` enter, a typed and checked `Recipe` leaves."""
