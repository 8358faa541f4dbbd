//! The clients of the clouds and of plain HTTP. Each is a feature of its own, on by default, and a build without one says so.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::bail;
use object_store::{ObjectStore, ObjectStoreScheme};
use url::Url;

/// A client for an address, which reads its settings from the environment's `variables`. Sends nothing yet.
pub(super) fn open(
    scheme: &ObjectStoreScheme,
    url: &Url,
    variables: &BTreeMap<String, String>,
) -> anyhow::Result<Arc<dyn ObjectStore>> {
    let _ = (url, variables); // of use only to clients
    // Clients take their TLS from here; somebody else's choice is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match scheme {
        #[cfg(feature = "aws")]
        ObjectStoreScheme::AmazonS3 => clients::s3(url, variables),
        #[cfg(feature = "azure")]
        ObjectStoreScheme::MicrosoftAzure => clients::azure(url, variables),
        #[cfg(feature = "gcp")]
        ObjectStoreScheme::GoogleCloudStorage => clients::google(url, variables),
        #[cfg(feature = "http")]
        ObjectStoreScheme::Http => clients::http(url),
        other => {
            let (what, feature) = match other {
                ObjectStoreScheme::AmazonS3 => ("S3", "aws"),
                ObjectStoreScheme::MicrosoftAzure => ("Azure", "azure"),
                ObjectStoreScheme::GoogleCloudStorage => ("Google Cloud Storage", "gcp"),
                ObjectStoreScheme::Http => ("HTTP", "http"),
                _ => bail!("it is no place for a remote"),
            };
            bail!("this build has no client for {what}; build it with `--features {feature}`")
        }
    }
}

#[cfg(any(feature = "aws", feature = "azure", feature = "gcp", feature = "http"))]
mod clients {
    use std::time::Duration;

    use object_store::{BackoffConfig, ClientOptions, RetryConfig};

    use super::{Arc, BTreeMap, ObjectStore, Url};

    type Store = anyhow::Result<Arc<dyn ObjectStore>>;
    #[cfg(any(feature = "aws", feature = "azure", feature = "gcp"))]
    type Variables = BTreeMap<String, String>;

    /// How all of them connect. `plain` allows unencrypted HTTP.
    fn options(plain: bool) -> ClientOptions {
        ClientOptions::new()
            .with_user_agent(object_store::HeaderValue::from_static(concat!(
                "pipeline/",
                env!("CARGO_PKG_VERSION")
            )))
            .with_allow_http(plain)
            .with_connect_timeout(Duration::from_secs(5))
            .with_read_timeout(Duration::from_mins(1))
            .with_pool_idle_timeout(Duration::from_secs(20))
            // A large file takes as long as it takes; a stalled one ends by the read timeout.
            .with_timeout_disabled()
    }

    fn retry() -> RetryConfig {
        RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 3,
            retry_timeout: Duration::from_secs(15),
        }
    }

    /// The variables of a cloud, for its builder, which knows them by the same names in lower case; others are not its own.
    #[cfg(any(feature = "aws", feature = "azure", feature = "gcp"))]
    fn settings<Key: std::str::FromStr>(
        prefix: &str,
        variables: &Variables,
    ) -> impl Iterator<Item = (Key, String)> {
        variables
            .iter()
            .filter(move |(name, _)| name.starts_with(prefix))
            .filter_map(|(name, value)| {
                Some((name.to_ascii_lowercase().parse().ok()?, value.clone()))
            })
    }

    #[cfg(feature = "aws")]
    pub(super) fn s3(url: &Url, variables: &Variables) -> Store {
        // An address in plain text was meant so.
        let plain = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
        let plain = plain.iter().any(|name| {
            let value = variables.get(*name);
            value.is_some_and(|value| value.starts_with("http://"))
        });
        let builder = object_store::aws::AmazonS3Builder::new().with_client_options(options(plain));
        let builder = settings("AWS_", variables).fold(builder, |builder, (key, value)| {
            builder.with_config(key, value)
        });
        Ok(Arc::new(
            builder.with_url(url.as_str()).with_retry(retry()).build()?,
        ))
    }

    #[cfg(feature = "gcp")]
    pub(super) fn google(url: &Url, variables: &Variables) -> Store {
        let mut builder =
            object_store::gcp::GoogleCloudStorageBuilder::new().with_client_options(options(false));
        if let Some(path) = variables.get("SERVICE_ACCOUNT") {
            builder = builder.with_service_account_path(path);
        }
        let builder = settings("GOOGLE_", variables).fold(builder, |builder, (key, value)| {
            builder.with_config(key, value)
        });
        Ok(Arc::new(
            builder.with_url(url.as_str()).with_retry(retry()).build()?,
        ))
    }

    #[cfg(feature = "azure")]
    pub(super) fn azure(url: &Url, variables: &Variables) -> Store {
        let builder =
            object_store::azure::MicrosoftAzureBuilder::new().with_client_options(options(false));
        let builder = settings("AZURE_", variables).fold(builder, |builder, (key, value)| {
            builder.with_config(key, value)
        });
        Ok(Arc::new(
            builder.with_url(url.as_str()).with_retry(retry()).build()?,
        ))
    }

    #[cfg(feature = "http")]
    pub(super) fn http(url: &Url) -> Store {
        let builder = object_store::http::HttpBuilder::new()
            .with_client_options(options(url.scheme() == "http"))
            .with_url(&url[..url::Position::BeforePath])
            .with_retry(retry());
        Ok(Arc::new(builder.build()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_was_left_out_is_told_of() {
        let variables = BTreeMap::from([
            ("AWS_REGION", "here"),
            ("AZURE_STORAGE_ACCOUNT_KEY", "a2V5"),
            ("AZURE_STORAGE_ACCOUNT_NAME", "account"),
        ]);
        let variables = variables.into_iter();
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let variables = variables.collect();
        for (address, feature, built) in [
            ("s3://bucket/x", "aws", cfg!(feature = "aws")),
            ("gs://bucket/x", "gcp", cfg!(feature = "gcp")),
            ("az://container/x", "azure", cfg!(feature = "azure")),
            ("https://host/x", "http", cfg!(feature = "http")),
        ] {
            let url = Url::parse(address).unwrap();
            let (scheme, _) = ObjectStoreScheme::parse(&url).unwrap();
            let error = open(&scheme, &url, &variables).err();
            let error = error.map(|error| error.to_string()).unwrap_or_default();
            let told = error.contains("this build has no client")
                && error.contains(&format!("--features {feature}"));
            assert_eq!(told, !built, "{address}: {error}");
        }
    }
}
