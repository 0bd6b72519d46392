"""The HTTP edge: what Label Studio and operators call."""
