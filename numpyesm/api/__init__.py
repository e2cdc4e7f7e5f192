"""The API that the HTTP service and the Lambda function share: models, checks of requests, errors.

It contains no server, and needs only NumPy and the standard library.
"""
