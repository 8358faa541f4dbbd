//! From a model folder's tensors and an adapter's pairs to a [`Llama`].

use std::sync::Arc;

use anyhow::Context as _;
use candle_core::{DType, Device, Tensor, Var};

use super::super::adapter::Adapter;
use super::super::config::LlamaConfig;
use super::super::float::Float;
use super::super::forward::Path;
use super::super::fused::{self, Packing, Pool};
use super::super::linear::{Base, Linear, Lora, Weight};
use super::super::nf4::Nf4;
use super::super::weights::Weights;
use super::{Layer, Llama, Norm, Parameter, Trained};

/// Reads a model's tensors into the places where they are wanted.
pub(super) struct Loader<'a> {
    config: &'a LlamaConfig,
    weights: &'a Weights,
    adapter: Option<&'a Adapter>,
    trained: Trained,
    compute: DType,
    device: &'a Device,
    parameters: Vec<Parameter>,
    linears: u64,
}

impl<'a> Loader<'a> {
    pub(super) fn new(
        config: &'a LlamaConfig,
        weights: &'a Weights,
        adapter: Option<&'a Adapter>,
        trained: Trained,
        compute: DType,
        device: &'a Device,
    ) -> Self {
        Self {
            config,
            weights,
            adapter,
            trained,
            compute,
            device,
            parameters: Vec::new(),
            linears: 0,
        }
    }

    pub(super) fn shaped(&self, name: &str, shape: &[usize]) -> anyhow::Result<Tensor> {
        let tensor = self.weights.tensor(name, self.device)?;
        anyhow::ensure!(
            tensor.dims() == shape,
            "the tensor `{name}` has the shape {:?}, expected {shape:?} from config.json",
            tensor.dims()
        );
        Ok(tensor)
    }

    fn train(&mut self, name: String, tensor: &Tensor, decays: bool) -> anyhow::Result<Weight> {
        let var = Var::from_tensor(&tensor.to_dtype(DType::F32)?.force_contiguous()?)?;
        self.parameters.push(Parameter {
            name,
            var: var.clone(),
            decays,
        });
        Ok(Weight::Trained(var))
    }

    /// A weight of the base; a frozen one is held in `dtype`.
    fn weight(&mut self, name: &str, shape: &[usize], dtype: DType) -> anyhow::Result<Weight> {
        let tensor = self.shaped(name, shape)?;
        if self.trained == Trained::Everything {
            return self.train(name.to_owned(), &tensor, !name.contains("norm"));
        }
        Ok(Weight::Frozen(tensor.to_dtype(dtype)?))
    }

    pub(super) fn norm(&mut self, name: &str) -> anyhow::Result<Norm> {
        Ok(Norm {
            weight: self.weight(
                &format!("{name}.weight"),
                &[self.config.hidden_size],
                DType::F32,
            )?,
            eps: self.config.rms_norm_eps,
        })
    }

    fn linear(&mut self, path: &str, out: usize, input: usize) -> anyhow::Result<Linear> {
        let name = format!("{path}.weight");
        let base = if let Some(nf4) = Nf4::load(self.weights, &name)? {
            anyhow::ensure!(
                self.trained != Trained::Everything,
                "`{name}` is stored in 4 bits and can't be trained itself; give an adapter"
            );
            anyhow::ensure!(
                nf4.shape == (out, input),
                "the 4-bit tensor `{name}` has the shape {:?}, expected {:?} from config.json",
                nf4.shape,
                (out, input)
            );
            Base::Nf4(Arc::new(nf4))
        } else {
            Base::Dense(self.weight(&name, &[out, input], self.compute)?)
        };
        let lora = match self
            .adapter
            .and_then(|adapter| Some((adapter, adapter.tensors.get(path)?)))
        {
            Some((adapter, pair)) => {
                let config = &adapter.config;
                anyhow::ensure!(
                    pair.a.dims() == [config.r, input] && pair.b.dims() == [out, config.r],
                    "the adapter's pair for `{path}` has the shapes {:?} and {:?}, expected {:?} and {:?}",
                    pair.a.dims(),
                    pair.b.dims(),
                    [config.r, input],
                    [out, config.r]
                );
                let a = pair.a.to_device(self.device)?.to_dtype(DType::F32)?;
                let b = pair.b.to_device(self.device)?.to_dtype(DType::F32)?;
                let (scaling, dropout) = (config.scaling(), config.lora_dropout);
                let (a, b) = if self.trained == Trained::Adapter {
                    (
                        self.train(format!("{path}.lora_A.weight"), &a, true)?,
                        self.train(format!("{path}.lora_B.weight"), &b, true)?,
                    )
                } else {
                    (Weight::Frozen(a), Weight::Frozen(b))
                };
                Some(Lora {
                    a,
                    b,
                    scaling,
                    dropout,
                })
            }
            None => None,
        };
        self.linears += 1;
        Ok(Linear {
            base,
            lora,
            compute: self.compute,
            index: self.linears,
        })
    }

    pub(super) fn layer(&mut self, number: usize) -> anyhow::Result<Layer> {
        let config = self.config;
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let q_width = config.num_attention_heads * config.head_dim;
        let kv_width = config.num_key_value_heads * config.head_dim;
        let path = format!("model.layers.{number}");
        Ok(Layer {
            q: self.linear(&format!("{path}.self_attn.q_proj"), q_width, hidden)?,
            k: self.linear(&format!("{path}.self_attn.k_proj"), kv_width, hidden)?,
            v: self.linear(&format!("{path}.self_attn.v_proj"), kv_width, hidden)?,
            o: self.linear(&format!("{path}.self_attn.o_proj"), hidden, q_width)?,
            gate: self.linear(&format!("{path}.mlp.gate_proj"), inner, hidden)?,
            up: self.linear(&format!("{path}.mlp.up_proj"), inner, hidden)?,
            down: self.linear(&format!("{path}.mlp.down_proj"), hidden, inner)?,
            input_norm: self.norm(&format!("{path}.input_layernorm"))?,
            post_norm: self.norm(&format!("{path}.post_attention_layernorm"))?,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        })
    }
}

impl Llama {
    /// Reads a model, with an adapter if given. Products run in `compute` (f32, bf16 or f16).
    pub fn load(
        config: &LlamaConfig,
        weights: &Weights,
        adapter: Option<&Adapter>,
        trained: Trained,
        compute: DType,
        device: &Device,
    ) -> anyhow::Result<Self> {
        let mut loader = Loader::new(config, weights, adapter, trained, compute, device);
        let vocabulary = [config.vocab_size, config.hidden_size];
        let tied = config.tie_word_embeddings;
        // Only rows of it are used, made f32 one by one; a tied one is the head's weight too.
        let embed = "model.embed_tokens.weight";
        let stored = Float::of(weights.raw(embed)?.dtype).map(Float::dtype);
        let embed_dtype = stored.filter(|_| !tied).unwrap_or(compute);
        let embed = loader.weight(embed, &vocabulary, embed_dtype)?;
        let layers: Vec<_> = (0..config.num_hidden_layers)
            .map(|number| {
                let layer = loader.layer(number);
                weights.release();
                layer.with_context(|| format!("could not load layer {number}"))
            })
            .collect::<anyhow::Result<_>>()?;
        let norm = loader.norm("model.norm")?;
        let head = if tied {
            None
        } else {
            Some(loader.weight("lm_head.weight", &vocabulary, compute)?)
        };
        let parameters = loader.parameters;
        if let Some(adapter) = adapter {
            let used = layers.iter().flat_map(Layer::linears);
            let used = used.filter(|linear| linear.lora.is_some()).count();
            anyhow::ensure!(
                used == adapter.tensors.len(),
                "the adapter has pairs for {} modules, but the model has only {used} of them",
                adapter.tensors.len()
            );
        }
        anyhow::ensure!(
            trained == Trained::Nothing || !parameters.is_empty(),
            "there is nothing to train"
        );
        let mut model = Self {
            config: config.clone(),
            parameters,
            device: device.clone(),
            embed,
            layers,
            norm,
            head,
            compute,
            frozen_column_sum: None,
            path: Path::Plain,
            pool: Pool::default(),
        };
        if fused::supports(&model) {
            model.path = Path::Fused(Packing::default());
        }
        if trained != Trained::Everything {
            model.frozen_column_sum = Some(model.column_sum()?);
        }
        Ok(model)
    }
}

impl Layer {
    pub(in crate::ml) fn linears(&self) -> [&Linear; 7] {
        [
            &self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down,
        ]
    }
}
