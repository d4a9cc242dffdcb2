"""Set-up, and studies that are not the product (`python -m scripts.NAME`)."""
