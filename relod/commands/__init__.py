"""The commands of `relod`: each parses, calls and prints. What they call is imported only then."""
