"""Chat templates that know tools, each short, and each with the marks of one family of models."""

# Calls and their answers are written as Hermes and Qwen models do.
HERMES_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|system|>Tools:' }}
{%- for tool in tools %}
{{- '\\n' + tool | tojson }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'tool' %}
{{- '<|user|><tool_response>' + message['content'] + '</tool_response>' }}
{%- else %}
{{- '<|' + message['role'] + '|>' + message['content'] }}
{%- for call in message['tool_calls'] or [] %}
{{- '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
{{- call['function']['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

# A list stands in one pair of tags, as the first SmolLM models were taught.
SMOLLM_TEMPLATE = HERMES_TEMPLATE.replace(
    "Tools:", 'Tools, to be called as <tool_call>[{"name": ..., "arguments": ...}]</tool_call>:'
)

# Tools have a name of their own, and what was called before is left out.
XML_TOOLS_TEMPLATE = """\
{{- bos_token }}
{%- if xml_tools %}
{{- '<|system|>Call one as <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call>:' }}
{%- for tool in xml_tools %}
{{- '\\n' + (tool | string) }}
{%- endfor %}
{%- endif %}
{%- for message in messages %}
{{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

# One call in a message, and no more.
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '<|system|>Respond in the format {"name": function name, "parameters": its arguments}.' }}
{%- for tool in tools %}
{{- '\\n' + tool | tojson }}
{%- endfor %}
{{- eos_token }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' or message.role == 'ipython' %}
{{- '<|user|>' + message.content + eos_token }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}
{{- raise_exception('This model takes one call at once!') }}
{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|assistant|>{"name": "' + call.name + '", ' }}
{{- '"parameters": ' + call.arguments | tojson + '}' + eos_token }}
{%- else %}
{{- '<|' + message.role + '|>' + message.content | trim + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

# Calls have ids of nine letters and digits, which their answers name.
MISTRAL_LIST_TEMPLATE = """\
{{- bos_token }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == asked[-1] %}
{{- '[AVAILABLE_TOOLS] [' }}
{%- for tool in tools %}
{{- tool | tojson + (', ' if not loop.last else '') }}
{%- endfor %}
{{- '][/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '<|user|>' + message.content }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
{{- ', ' if not loop.last else ']' + eos_token }}
{%- endfor %}
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' }}
{{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}
{{- '<|' + message.role + '|>' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

MISTRAL_TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{{- '<|assistant|>' + message.content }}
{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
{%- else %}
{{- '<|' + message.role + '|>' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}"""

# Calls are XML: not read, hence refused.
CODER_TEMPLATE = HERMES_TEMPLATE.replace("Tools:", "Call as <tool_call>\\n<function=name>:")

TOOL_TEMPLATES = {
    "hermes": HERMES_TEMPLATE,
    "smollm": SMOLLM_TEMPLATE,
    "xml tools": XML_TOOLS_TEMPLATE,
    "llama": LLAMA_TEMPLATE,
    "mistral list": MISTRAL_LIST_TEMPLATE,
    "mistral": MISTRAL_TEMPLATE,
}
# Of these families' own tokens, the ones that are special.
TOOL_TOKENS = {
    "llama": ("<|python_tag|>",),
    "mistral list": ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
}
