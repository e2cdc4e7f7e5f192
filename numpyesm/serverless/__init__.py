"""The service as an AWS Lambda function: set its handler to `numpyesm.serverless.handler`.

No web framework is loaded. Inside Lambda the model is loaded when this package is imported, in the
function's init phase, which has a whole CPU; elsewhere, when the first event comes.
"""

import os

from .function import Function

_function = Function()
if os.environ.get("AWS_LAMBDA_FUNCTION_NAME"):
    _function.load()
handler = _function.handle

__all__ = ["handler"]
