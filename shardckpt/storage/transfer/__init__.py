"""How bytes are moved, whatever the place: which reads make one request, several at a time, and was it what we sent."""
