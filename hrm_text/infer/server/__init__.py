"""The server: completions and chat over HTTP, in the form of the OpenAI API, and a page to try them on."""

from hrm_text.contracts import UserError

try:
    import fastapi
    import prometheus_client
    import uvicorn
except ModuleNotFoundError as error:
    raise UserError(
        f'the server needs packages that are not installed ({error.name}): pip install "hrm-text[serve]"'
    ) from None

assert fastapi and prometheus_client and uvicorn
