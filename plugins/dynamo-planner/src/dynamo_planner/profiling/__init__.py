"""`dynamo profile`: measures what one worker can do."""
