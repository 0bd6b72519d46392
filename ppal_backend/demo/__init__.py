"""The demo: generated data, a scripted annotator and a Label Studio of its own."""
