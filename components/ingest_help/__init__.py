"""The component in `component.py`."""
