"""``ka2l export``: a run handed over.

package.py  the export as a whole
source.py   which model state
card.py     the model card
data.py     annotated data in other tools' formats
serve.py    the command that serves it with vLLM
folder.py   the folder, whole or not at all
hub.py      upload to the Hugging Face hub
"""
