"""amlmount next to its peers, on an origin of our own: `python -m bench --help`; see README.md."""
