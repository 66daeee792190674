"""both routes, streams, the list of models, errors"""

import os

import openai

openai.api_base, openai.api_key = os.environ["URL"], "none"
assert [model.id for model in openai.Model.list().data] == ["tooled"]
text = openai.Completion.create(model="tooled", prompt="def ", max_tokens=4, temperature=0)
pieces = openai.Completion.create(model="tooled", prompt="def ", max_tokens=4, temperature=0, stream=True)
assert "".join(piece.choices[0].text for piece in pieces) == text.choices[0].text
messages = [{"role": "user", "content": "x"}]
assert openai.ChatCompletion.create(model="tooled", messages=messages, max_tokens=4).choices[0].message.content
try:
    openai.ChatCompletion.create(model="none", messages=messages)
    said = ""
except openai.error.InvalidRequestError as error:
    said = str(error)
assert "expected one of tooled" in said
