"""Makes ms-swift know our assistants: swift sft --external_plugins plugin.py --model FOLDER ..."""

from stepwell.integrations.ms_swift import register

register()
