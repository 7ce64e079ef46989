"""Items: programs that make questions, and loaders of public data sets."""
