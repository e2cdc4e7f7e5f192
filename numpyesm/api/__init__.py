"""The API that the HTTP service and the Lambda function share: what is served, checks of requests, what errors say.

There is no server in here, and nothing but NumPy and the standard library is needed.
"""
