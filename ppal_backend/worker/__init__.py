"""The job process: the queue, what is done about events and polls, and which round runs when."""
