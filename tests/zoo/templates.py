"""Chat templates of our own, one for each set of features that published templates have. None is a copy.

Every template reads `messages` and `add_generation_prompt`. The features are in the name's comment.
"""

from __future__ import annotations

TEMPLATES = {
    # ChatML
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # ChatML, a default system prompt
    "chatml-system": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nAnswer with care.<|im_end|>\n{% endif %}"
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # ChatML, reasoning of earlier turns is dropped, generation markers
    "chatml-reasoning": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}{% generation %}"
        "{% if '</think>' in message.content and not loop.last %}"
        "{{ message.content.split('</think>')[-1].lstrip('\\n') }}"
        "{% else %}{{ message.content }}{% endif %}<|im_end|>{% endgeneration %}\n"
        "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # [INST], the BOS in the template, EOS after answers, an exception where roles do not alternate
    "inst": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant take turns') }}"
        "{% endif %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    # header ids, the BOS in the template, a date, content stripped
    "headers": (
        "{{ bos_token }}{% if messages[0].role != 'system' %}<|start_header_id|>system<|end_header_id|>\n\n"
        "Today: {{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}<|eot_id|>{% endif %}"
        "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # words as markers, EOS after every message
    "markers": (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # markers with an end-of-turn token of their own
    "markers-end": (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    # ChatML with a separator token
    "chatml-separator": (
        "{% for message in messages %}"
        "<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
    ),
    # the BOS in the template, `model` for the assistant, an exception for a system message, content stripped
    "turns": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'system' %}{{ raise_exception('no system message is supported') }}{% endif %}"
        "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # full-width markers, the BOS in the template, reasoning dropped, a thinking prompt
    "full-width": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'user' %}<｜User｜>{{ message.content }}"
        "{% elif message.role == 'assistant' %}"
        "<｜Assistant｜>{{ message.content.split('</think>')[-1] }}{{ eos_token }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    # roles between role tokens
    "roles": (
        "{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}"
        "{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    ),
    # a prefix of two tokens, then role tokens without an end of turn
    "prefix": (
        "[gMASK]<sop>{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    # channels
    "channels": (
        "{% for message in messages %}<|start|>{{ message.role }}"
        "{% if message.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ message.content }}"
        "{{ '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
}
