"""The few adapters to the host, one file for each thing adapted."""
