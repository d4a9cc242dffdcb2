"""What goes wrong, on purpose: killed replicas, hang-ups at full pressure, hostile requests."""
