"""Disks below devices: requests, and the images that hold their data."""
