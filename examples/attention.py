"""Lightning Attention alone, in a module of your own: linear time, and a state to go on from."""

import torch

from transnormer import lightning_attention

B, T, H, K, V = 2, 1000, 4, 32, 64  # rows, tokens, heads, key and value width
q, k, v = torch.randn(B, T, H, K), torch.randn(B, T, H, K), torch.randn(B, T, H, V)
# natural logarithm of each head's decay per token
log_decay = -torch.tensor([2.0 ** -(h + 1) for h in range(H)])

whole = lightning_attention(q, k, v, log_decay)  # [B, T, H, V]

first, state = lightning_attention(q[:, :600], k[:, :600], v[:, :600], log_decay, return_state=True)
rest = lightning_attention(q[:, 600:], k[:, 600:], v[:, 600:], log_decay, state=state)
print(
    "in two pieces, largest difference:",
    float((torch.cat([first, rest], dim=1) - whole).abs().max()),
)
