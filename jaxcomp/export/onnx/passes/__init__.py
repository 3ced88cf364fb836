"""What is done to a finished graph so that runtimes find the patterns that they run fast."""
