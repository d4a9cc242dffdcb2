"""Fidelity of the methods against dense decoding, through the engine that serves."""
