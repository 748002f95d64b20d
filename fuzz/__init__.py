"""What happens to the server when those at the other end are careless or hostile, found out with bytes from everywhere."""
