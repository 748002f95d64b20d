"""What happens around every call of the service, whichever method it is."""
