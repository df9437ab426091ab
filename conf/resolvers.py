"""What `${name:...}` in our YAML files may say beside what Hydra brings.

${first_set:a,b}    a, or b where a is null or empty
"""

from omegaconf import OmegaConf

OmegaConf.register_new_resolver("first_set", lambda first, second: first or second, replace=True)
