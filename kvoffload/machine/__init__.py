"""What a machine is: devices, links and rates with their provenance, the memory the host has, where files are kept."""
