//! Which certificates are trusted, and the sentences for those that are not.

use std::path::Path;

use anyhow::ensure;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::HubSettings;

/// The settings for https: what a variable names, else what the system trusts, else (on a system without any) Mozilla's list,
/// which is compiled in.
pub(super) fn config(settings: &HubSettings) -> anyhow::Result<TlsConfig> {
    let roots = match &settings.authorities {
        Some((variable, path)) => RootCerts::from(named(variable, path)?),
        None => match rustls_native_certs::load_native_certs().certs {
            found if found.is_empty() => RootCerts::WebPki,
            found => RootCerts::from(
                found
                    .into_iter()
                    .map(|found| Certificate::from_der(&found).to_owned()),
            ),
        },
    };
    Ok(TlsConfig::builder().root_certs(roots).build())
}

fn named(variable: &str, path: &Path) -> anyhow::Result<Vec<Certificate<'static>>> {
    let (file, folder) = if path.is_dir() {
        (None, Some(path))
    } else {
        (Some(path), None)
    };
    let found = rustls_native_certs::load_certs_from_paths(file, folder);
    let certificates: Vec<_> = found
        .certs
        .iter()
        .map(|found| Certificate::from_der(found).to_owned())
        .collect();
    let reason = found.errors.first().map(|error| format!(": {error}"));
    ensure!(
        !certificates.is_empty(),
        "`{variable}` names `{}`, which holds no certificate in PEM form{}",
        path.display(),
        reason.unwrap_or_default()
    );
    Ok(certificates)
}

/// Why a certificate was refused, if that is what went wrong.
pub(super) fn refusal(error: &ureq::Error, host: &str) -> Option<String> {
    use rustls::CertificateError as Reason;
    let rustls::Error::InvalidCertificate(reason) = inner(error)? else {
        return None;
    };
    let from_authority = "if your company's proxy or mirror has an authority of its own, set `SSL_CERT_FILE` to a file with its \
                          certificate in PEM form";
    Some(match reason {
        // Another authority of the same name.
        Reason::UnknownIssuer | Reason::BadSignature => format!(
            "the certificate of `{host}` is signed by an authority that is not trusted here; {from_authority}"
        ),
        Reason::NotValidForName | Reason::NotValidForNameContext { .. } => {
            format!("the certificate that `{host}` shows is for another host ({reason})")
        }
        Reason::Expired | Reason::ExpiredContext { .. } => {
            format!(
                "the certificate of `{host}` has expired ({reason}); is this machine's clock right?"
            )
        }
        Reason::NotValidYet | Reason::NotValidYetContext { .. } => {
            format!(
                "the certificate of `{host}` is not valid yet ({reason}); is this machine's clock right?"
            )
        }
        other => {
            format!("the certificate of `{host}` can't be trusted ({other}); {from_authority}")
        }
    })
}

/// The reason of rustls, which comes by itself or inside an error of reading.
fn inner(error: &ureq::Error) -> Option<&rustls::Error> {
    match error {
        ureq::Error::Rustls(error) => Some(error),
        ureq::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}
