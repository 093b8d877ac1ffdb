DETAILED_PROMPT_WITH_SPECIAL_TOKEN = "<|VQ_reward|><|MQ_reward|>{text_prompt}<|TA_reward|>"
